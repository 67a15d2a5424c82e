// The address holds the view and what was entered: #/try?text=...&models=reviews,base

export function read() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  return { view: path, given: new URLSearchParams(query || "") };
}

export function write(view, facts) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(facts)) if (value !== "" && value !== undefined && value !== null) query.set(name, value);
  const text = query.toString();
  history.replaceState(null, "", `#/${view}${text ? `?${text}` : ""}`);
}
