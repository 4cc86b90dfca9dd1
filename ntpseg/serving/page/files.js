// Files that are dropped or chosen; a folder's are collected from all its levels.

async function entriesOf(reader) {
  const all = [];
  for (;;) {
    // A reader gives a hundred at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return all;
    all.push(...some);
  }
}

async function filesOf(entry, limit, found) {
  if (found.length > limit || entry.name.startsWith(".")) return;
  if (entry.isFile) {
    found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
  } else {
    for (const inner of await entriesOf(entry.createReader())) await filesOf(inner, limit, found);
  }
}

export async function dropped(transfer, limit) {
  // Entries are to be taken before the first wait, after which the transfer is empty.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  for (const entry of entries) await filesOf(entry, limit, found);
  return found;
}

export function checkFiles(files, limits) {
  const own = files.filter((file) => file.name !== "DICOMDIR" && !file.name.startsWith("."));
  const size = own.reduce((sum, file) => sum + file.size, 0);
  if (!own.length) throw new Error("there is no file in what was dropped");
  if (own.length > limits.max_files) {
    throw new Error(`an upload must have at most ${limits.max_files.toLocaleString("en")} files, got more`);
  }
  if (size > limits.max_upload_bytes) {
    const most = Math.round(limits.max_upload_bytes / 2 ** 20).toLocaleString("en");
    throw new Error(`an upload must have at most ${most} MiB, got ${Math.round(size / 2 ** 20).toLocaleString("en")} MiB`);
  }
  return own;
}
