// The server's API. Addresses are relative, so that the page works behind a proxy's path, too.

async function checked(response) {
  if (response.ok) return response;
  let detail = `the server answered ${response.status}`, series;
  try {
    ({ detail = detail, series } = await response.json());
  } catch {
    // A proxy's own answer is no JSON.
  }
  throw Object.assign(new Error(detail), { series });
}

async function reach(address, options) {
  try {
    return await checked(await fetch(address, options));
  } catch (error) {
    if (error instanceof TypeError) throw new Error("the server cannot be reached, or ended the connection");
    throw error;
  }
}

export async function getModel() {
  return (await reach("api/model")).json();
}

export async function upload(files, series) {
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  if (series != null) form.append("series", series);
  return (await reach("api/images", { method: "POST", body: form })).json();
}

export function forgetImage(image) {
  return fetch(`api/images/${image}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

export function forgetMask(image, mask) {
  return fetch(`api/images/${image}/masks/${mask}`, { method: "DELETE" }).catch(() => {});
}

export function sliceAddress(image, { axis, index, window }) {
  return `api/images/${image}/slice.png?${new URLSearchParams({ axis, index, window })}`;
}

export function maskAddress(image, mask, { axis, index }, form = "mask") {
  return `api/images/${image}/masks/${mask}.png?${new URLSearchParams({ axis, index, form })}`;
}

export function niftiAddress(image, mask) {
  return `api/images/${image}/masks/${mask}.nii.gz`;
}

export async function getBitmap(address, signal) {
  return createImageBitmap(await (await reach(address, { signal })).blob());
}

// The events of a decode, as they come.
export async function* segment(request, signal) {
  const response = await reach("api/segment", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}
