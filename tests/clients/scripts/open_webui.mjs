// A person on a fresh Open WebUI: looks at the list of models, asks, reads, unfolds the thought.
// Arguments: Chromium, address of Open WebUI, folder for screenshots. Prints what was seen as JSON.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [executablePath, base, folder] = process.argv.slice(2);
const QUIET = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
  "--disable-background-networking", "--disable-component-update",
];
const profile = mkdtempSync(join(tmpdir(), "open-webui-browser-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath, headless: true, args: QUIET, viewport: { width: 1200, height: 800 },
});
context.setDefaultTimeout(60_000);
const page = context.pages()[0];
const outside = new Set();
page.on("request", (request) => {
  const url = new URL(request.url());
  if (url.protocol.startsWith("http") && url.hostname !== "127.0.0.1") outside.add(url.hostname);
});
const shot = (name) => page.screenshot({ path: join(folder, `${name}.png`) });

try {
  await page.goto(base);
  const input = page.locator("#chat-input");
  await input.waitFor();
  const signIn = await page.locator("input[type=password]").count();
  // The news of the release lie over the page at the first visit.
  const news = page.getByRole("button", { name: /Let's Go/ });
  await news.waitFor({ timeout: 5_000 }).then(() => news.click()).catch(() => {});

  await page.locator("#model-selector-model-button").click();
  const items = page.getByRole("option");
  await items.first().waitFor();
  const models = await items.allInnerTexts();
  await shot("models");
  await page.getByRole("option", { name: "Select deepseek-r1 model" }).click();

  await input.click();
  await page.keyboard.type("What is 7 + 5?");
  await page.keyboard.press("Enter");
  const lengths = new Set();  // of the answer while it grows: more than one if it is streamed
  const answer = page.locator("#response-content-container").last();
  await answer.waitFor();
  const thought = page.getByText(/^Thought for/).first();
  const copy = page.locator("button.copy-response-button, [aria-label=Copy]").last();
  for (let turn = 0; turn < 2400; turn += 1) {
    lengths.add((await answer.innerText()).length);
    if ((await thought.count()) && (await copy.count())) break;
    await page.waitForTimeout(50);
  }
  await thought.waitFor();
  await page.waitForTimeout(3_000);  // the title and the follow-ups
  await shot("answer");
  const folded = await answer.innerText();
  await thought.click();
  await page.waitForTimeout(1_000);
  await shot("thought");
  const unfolded = await answer.innerText();
  console.log(JSON.stringify({
    signIn, models, folded, unfolded, lengths: [...lengths], outside: [...outside],
  }));
} catch (error) {
  await shot("failure").catch(() => {});
  throw error;
} finally {
  await context.close();
}
