// Comma-separated values as RFC 4180 has them: quotes, doubled quotes, line breaks within quotes.

export function parse(text) {
  const source = text.replace(/^\uFEFF/, "");
  const head = source.split(/\r?\n/, 1)[0];
  const mark = [",", ";", "\t"].reduce((best, one) => (head.split(one).length > head.split(best).length ? one : best), ",");
  const rows = [];
  let row = [], cell = "", inside = false, began = false;
  const close = () => { row.push(cell); cell = ""; began = false; };
  for (let i = 0; i < source.length; i++) {
    const c = source[i];
    if (inside) {
      if (c !== '"') cell += c;
      else if (source[i + 1] === '"') { cell += '"'; i++; }
      else inside = false;
    } else if (c === '"' && !began && cell === "") { inside = began = true; }
    else if (c === mark) close();
    else if (c === "\n" || c === "\r") {
      if (c === "\r" && source[i + 1] === "\n") i++;
      close(); rows.push(row); row = [];
    } else cell += c;
  }
  if (inside) throw new Error(`A quote that opens in row ${rows.length + 1} is never closed.`);
  if (cell !== "" || row.length) { close(); rows.push(row); }
  const filled = rows.filter((one) => one.length > 1 || one[0] !== "");
  if (filled.length < 2) throw new Error("Expected a line of column names and at least one row.");
  const columns = filled[0].map((name, i) => name.trim() || `column ${i + 1}`);
  const uneven = filled.findIndex((one) => one.length !== columns.length);
  if (uneven > 0) throw new Error(`Row ${uneven + 1} has ${filled[uneven].length} cells; the first line has ${columns.length}.`);
  return { columns, rows: filled.slice(1) };
}

// A cell that a spreadsheet would run as a formula is quoted with an apostrophe.
const safe = (text) => (/^[=+@\t\r]|^-(?!\d)/.test(text) ? `'${text}` : text);
const cell = (value) => { const text = safe(String(value ?? "")); return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
export const write = (columns, rows) => [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
