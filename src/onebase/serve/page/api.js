// Every request to the server, its key, and its errors as sentences.

const KEY = "onebase-key";
export const key = () => sessionStorage.getItem(KEY) || "";
export const setKey = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function send(method, path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  if (!answer.ok) {
    let said = `The server answers ${answer.status}.`;
    try { said = (await answer.json()).error.message; } catch { /* no body: the status is all there is */ }
    if (answer.status === 401) said += " Set it with the button Key above.";
    throw new Refused(answer.status, said);
  }
  return answer;
}

const json = async (...given) => (await send(...given)).json();
export const get = (path, signal) => json("GET", path, undefined, signal);
export const post = (path, body, signal) => json("POST", path, body, signal);
export const remove = (path) => json("DELETE", path);
export const models = async () => (await get("/v1/models")).data;

// Yields the chunks of a streamed completion.
export async function* stream(path, body, signal) {
  const answer = await send("POST", path, { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const said = line.slice(5).trim();
      if (said === "[DONE]") return;
      const chunk = JSON.parse(said);
      if (chunk.error) throw new Refused(500, chunk.error.message);
      yield chunk;
    }
  }
}
