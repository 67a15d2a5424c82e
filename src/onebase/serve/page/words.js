// Which words of one text are not in another: the longest common run of words is what is shared.

const MOST = 600; // words; beyond that only the common beginning is compared

export function differing(text, other) {
  const a = text.split(/(\s+)/).filter(Boolean), b = other.split(/(\s+)/).filter(Boolean);
  if (a.length > MOST || b.length > MOST) {
    let same = 0;
    while (same < a.length && a[same] === b[same]) same++;
    return a.map((word, i) => ({ word, marked: i >= same && /\S/.test(word) }));
  }
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const found = [];
  for (let i = 0, j = 0; i < a.length; i++) {
    while (j < b.length && a[i] !== b[j] && table[i][j + 1] > table[i + 1][j]) j++;
    const shared = j < b.length && a[i] === b[j];
    if (shared) j++;
    found.push({ word: a[i], marked: !shared && /\S/.test(a[i]) });
  }
  return found;
}
