// Where two texts part, and which of their words differ.

import { diffArrays } from "./vendor/diff/array.js";

const segmenter = new Intl.Segmenter(undefined, { granularity: "word" }); // words in every script
const TIMEOUT_MS = 300; // after which all that follows the parting counts as different

export const segments = (text) => Array.from(segmenter.segment(text), ({ segment }) => segment);

const isWord = (segment) => /[\p{L}\p{N}]/u.test(segment);
export const countWords = (list) => list.filter(isWord).length;

/**
 * {same: the text both begin with, parted, left, right: runs {text, differs} after it, agree: words before the parting,
 * shared: the fraction of words that stand in both}. While `right` still grows, its last word may be incomplete and only the
 * parting is looked for.
 */
export function compare(leftText, rightText, isWhole = true) {
  const left = segments(leftText);
  const right = segments(rightText);
  const end = isWhole ? Math.max(left.length, right.length) : Math.min(left.length, right.length - 1);
  let at = 0;
  while (at < end && left[at] === right[at]) at++;
  const same = left.slice(0, at);
  const changes = (isWhole && diffArrays(left.slice(at), right.slice(at), { timeout: TIMEOUT_MS })) || [
    { removed: true, value: left.slice(at) },
    { added: true, value: right.slice(at) },
  ];
  const isChange = ({ added, removed }) => added || removed;
  // a space between two differing words is no agreement
  const differs = (change, i) => isChange(change) || (i > 0 && i < changes.length - 1 && !change.value.some(isWord));
  const runs = (other) => {
    const runs = [];
    changes.forEach((change, i) => {
      if (change[other]) return;
      const run = { text: change.value.join(""), differs: isWhole && differs(change, i) };
      if (runs.at(-1)?.differs === run.differs) runs.at(-1).text += run.text;
      else runs.push(run);
    });
    return runs;
  };
  const agree = countWords(same);
  const kept = changes.reduce((n, change) => n + (isChange(change) ? 0 : countWords(change.value)), agree);
  return {
    same: same.join(""),
    parted: at < end,
    left: runs("added"),
    right: runs("removed"),
    agree,
    shared: (2 * kept) / Math.max(1, countWords(left) + countWords(right)),
  };
}
