// Runs one scenario: `node drive.mjs '{"name", "base", "chromium", "modules", ...}'`.
// Fails for an error in the page and for whatever its policy blocked, in every scenario.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import * as chat from "./chat_scenarios.mjs";
import * as engine from "./engine_scenarios.mjs";

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

const options = JSON.parse(process.argv[2]);
const { chromium } = createRequire(join(options.modules, "package.json"))("playwright-core");
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

/** Have the test that started this do something to the server; what it answers. */
async function server(what) {
  process.stdout.write(`@${what}\n`);
  return JSON.parse((await lines.next()).value);
}

const profile = mkdtempSync(join(tmpdir(), "fathom-browser-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: options.chromium,
  headless: true,
  args: FLAGS,
  locale: options.locale ?? "en-US",
  colorScheme: options.theme ?? "light",
  viewport: { width: Number(options.width ?? 1180), height: Number(options.height ?? 760) },
  reducedMotion: "reduce",
});
const page = context.pages()[0];
page.setDefaultTimeout(20_000);
const faults = [];
const requests = [];
page.on("pageerror", (error) => faults.push(`page error: ${error.stack}`));
page.on("console", (message) => {
  if (/Content Security Policy/i.test(message.text())) faults.push(message.text());
});
page.on("request", (request) => {
  requests.push(request);
  if (!request.url().startsWith(options.base)) faults.push(`asked elsewhere: ${request.url()}`);
});

let status = 0;
try {
  await page.goto(options.base);
  await { ...chat, ...engine }[options.name]({ page, context, requests, server, options });
  assert.deepEqual(faults, []);
} catch (error) {
  status = 1;
  console.log(error.stack, faults);
  await page.screenshot({ path: join(tmpdir(), `fathom-${options.name}.png`) }).catch(() => {});
}
await context.close();
rmSync(profile, { recursive: true, force: true });
process.exit(status);
