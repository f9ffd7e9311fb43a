// The engine's figures, small screens, and pictures of it all.

import assert from "node:assert/strict";
import { finished, last, say, shows } from "./steps.mjs";

/** 360 pixels: nothing is wider than the screen, and the list comes and goes. */
export async function narrow({ page }) {
  await say(page, "hello");
  await finished(page);
  const fits = () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth
    && document.querySelector("#turns").scrollWidth <= innerWidth);
  assert.equal(await fits(), true);
  assert.equal(await page.locator("#list").isVisible(), false);
  await page.click("#toggle-list");
  await page.locator("#conversations .open").click();
  assert.equal(await page.locator("#list").isVisible(), false);
  for (const name of ["#open-settings", "#tab-engine", "#model", "#send"]) {
    const { x, width } = await page.locator(name).boundingBox();
    assert.ok(x >= 0 && x + width <= 360, name);
  }
  await page.click("#open-settings");
  assert.equal(await fits(), true);
  await page.keyboard.press("Escape");
  await page.route("**/stats", (route) => route.fulfill({ json: STATS }));
  await page.click("#tab-engine");
  await shows(page.locator("#figures"), "7");
  assert.equal(await fits(), true);
}

const STATS = {
  model: "fathom-tiny", uptime_seconds: 7320, num_running: 7, num_waiting: 2, num_pages: 1000,
  num_free_pages: 640, num_cached_pages: 520, prompt_tokens_total: 20_000,
  cached_tokens_total: 15_000, generation_tokens_total: 9_876, tokens_per_second: 123.4,
  requests_total: { ok: 310, client_gone: 4 }, restarts: 1, ttft_seconds_p50: 0.042,
  requests: [
    { id: "req_6f1c0a93", key_id: "ann", prompt_tokens: 1834, completion_tokens: 211, seconds: 1.9 },
    { id: "<b>x</b>", key_id: null, prompt_tokens: 64, completion_tokens: 9, seconds: 0.25 },
  ],
};

/** Live figures once a second while they are seen, and plain words where there are none. */
export async function engine({ page, requests }) {
  const asked = () => requests.filter((request) => request.url().endsWith("/stats")).length;
  let stats = STATS;
  await page.route("**/stats", (route) => (
    stats ? route.fulfill({ json: stats }) : route.fulfill({ status: 404, json: { error: {
      code: "unknown_url", message: "Unknown request URL" } } })));
  const see = (visibility) => page.evaluate((state) => {
    Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
  }, visibility);
  const pollsLessThan = async (limit, act) => {
    await act();
    const before = asked();
    await page.waitForTimeout(2500);
    assert.ok(asked() - before < limit);
  };
  await pollsLessThan(1, () => {});
  await page.keyboard.press("Alt+e");
  await shows(page.locator(".speed"), "123.4");
  await shows(page.locator(".tiles"), /Running\s*7\s*Waiting\s*2.*75 %.*15,000 of 20,000 tokens.*42 ms/s);
  await shows(page.locator(".legend"), /360 in use\s*160 kept for reuse\s*480 free/);
  await shows(page.locator("tbody tr").first(), /req_6f1c0a93\s*ann\s*1,834\s*211\s*1\.9 s/);
  await shows(page.locator("tbody tr").last(), "<b>x</b>");
  await shows(page.locator(".head"), /2 h 2 min.*restarts: 1/);
  await shows(page.locator(".requests"), "ok 310");
  stats = { ...STATS, tokens_per_second: 50, num_running: 1, requests: [] };
  await shows(page.locator(".speed"), "50.0");
  await shows(page.locator(".requests"), "None is running.");
  const line = await page.getAttribute(".sparkline polyline", "points");
  assert.ok(line.split(" ").length >= 2, line);
  await pollsLessThan(2, () => page.keyboard.press("Alt+e"));
  await page.click("#tab-engine");
  await pollsLessThan(2, () => see("hidden"));
  stats = { ...STATS, tokens_per_second: 60 };
  await see("visible");
  await shows(page.locator(".speed"), "60.0");
  stats = null;
  await page.click("#tab-engine");
  await shows(page.locator("#figures"), "offers no figures");
}

/** Pictures for the README, in a folder. */
export async function pictures({ page, server, options }) {
  const take = (name) => page.screenshot({ path: `${options.folder}/${name}.png` });
  await say(page, "What is a prefix cache?");
  await finished(page);
  await server("next");
  await say(page, "And how does a program reach you?");
  await finished(page);
  await page.mouse.move(0, 0);
  await take("chat-light");
  await last(page).locator("summary").click();
  await page.locator("#turns").evaluate((turns) => turns.scrollTo(0, turns.scrollHeight));
  await page.mouse.move(0, 0);
  await page.emulateMedia({ colorScheme: "dark" });
  await take("chat-dark");
  let tick = 0;
  await page.route("**/stats", (route) => {
    tick += 1;
    const speed = 123 + 45 * Math.sin(tick / 6) + 20 * Math.sin(tick / 1.7);
    const [first, second] = STATS.requests;
    const requests = [first, { ...second, id: "req_b07d41ce", key_id: "default" }];
    route.fulfill({ json: { ...STATS, requests, tokens_per_second: speed } });
  });
  await page.evaluate(() => {
    const later = window.setTimeout;
    window.setTimeout = (work, delay) => later(work, delay === 1000 ? 10 : delay);
  });
  await page.setViewportSize({ width: 1100, height: 860 });
  await page.click("#tab-engine");
  while (tick < 100) await page.waitForTimeout(50);
  await take("engine-dark");
  await page.emulateMedia({ colorScheme: "light" });
  await take("engine-light");
  await page.click("#tab-chat");
  await page.click("#open-settings");
  await page.selectOption("#language", "zh");
  await take("settings-light");
  await page.keyboard.press("Escape");
  await page.setViewportSize({ width: 360, height: 700 });
  await take("narrow-light");
}
