// Markdown of an answer -> HTML that can do nothing: an answer may say anything, so it is hostile.

import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const ALLOWED = {
  ALLOWED_TAGS: (
    "p br hr em strong del code pre blockquote ul ol li h4 h5 h6 a table thead tbody tr th td"
  ).split(" "),
  ALLOWED_ATTR: ["href", "start", "target", "rel"], // no style and no src: neither layout nor requests
};

const escape = (text) => text.replace(/[&<>"]/g, (char) => `&#${char.charCodeAt(0)};`);

marked.use({
  renderer: {
    html: ({ text }) => escape(text), // tags that an answer talks about are shown, not obeyed
    image: ({ href, text }) => escape(`![${text}](${href})`),
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 3); // below the page's own
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

export const render = (text) => DOMPurify.sanitize(marked.parse(text), ALLOWED);
