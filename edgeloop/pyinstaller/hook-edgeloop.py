"""What a frozen program needs of edgeloop: the modules that are imported by name, the patched llama_cpp and its libraries."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, collect_submodules, copy_metadata

import edgeloop

VENDORED = "edgeloop._vendor.llama_cpp"

hiddenimports = sorted(set(edgeloop._PUBLIC.values()))
hiddenimports += collect_submodules(VENDORED, filter=lambda name: not name.startswith(f"{VENDORED}.server"))
# as files: edgeloop loads them from its folder under the name llama_cpp
module_collection_mode = {VENDORED: "py"}
# that name is edgeloop's here, whatever is installed
excludedimports = ["llama_cpp"]
binaries = collect_dynamic_libs("edgeloop")
datas = collect_data_files(
    "edgeloop", excludes=["_vendor/include", "_vendor/cmake", "_vendor/pkgconfig", "**/ggml-rpc-server*"]
)
datas += copy_metadata("edgeloop")
