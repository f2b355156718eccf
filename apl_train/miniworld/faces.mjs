// Turns facesjs face objects into SVG, one JSON line in, one JSON string out. Only `apl miniworld build` runs it.
//   node faces.mjs --parts         prints the part names by gender
//   node faces.mjs < faces.jsonl   prints one SVG (as a JSON string) a line
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import path from "node:path";

const root = process.env.APL_MINIWORLD_NODE_MODULES ?? "node_modules";
const require = createRequire(pathToFileURL(path.resolve(root, "..", "package.json")));
const entry = pathToFileURL(require.resolve("facesjs")).href;
const { faceToSvgString, svgsIndex } = await import(entry);

if (process.argv.includes("--parts")) {
  const { svgsGenders } = await import(new URL("./svgs-index.js", entry).href);
  const parts = {};
  for (const [kind, ids] of Object.entries(svgsIndex)) {
    parts[kind] = ids.map((id, i) => [id, svgsGenders[kind][i]]);
  }
  process.stdout.write(JSON.stringify(parts) + "\n");
} else {
  for await (const line of createInterface({ input: process.stdin })) {
    if (line.trim()) process.stdout.write(JSON.stringify(faceToSvgString(JSON.parse(line))) + "\n");
  }
}
