// What a reader does with the chat, and what must be seen then.

import assert from "node:assert/strict";
import { answers, bodies, enterKey, finished, keyed, last, press, say, shows } from "./steps.mjs";

/** Keys, a conversation of several turns, its figures, and what a reload keeps. */
export async function talk({ page, requests, options }) {
  await shows(page.locator("#notice"), "needs an API key");
  await page.click("#notice-action");
  assert.equal(await page.evaluate(() => document.activeElement.id), "key");
  await page.keyboard.press("Escape");
  await enterKey(page, "sk-wrong");
  await shows(page.locator("#notice"), "wrong");
  await enterKey(page, "密钥");
  await shows(page.locator("#notice"), "wrong");
  await say(page, "hello");
  await shows(last(page).locator(".error"), "key is wrong");
  await keyed(page, options);
  await page.locator("#notice").waitFor({ state: "hidden" });
  const models = await page.locator("#model option").allTextContents();
  assert.ok(models.includes("fathom-tiny"), String(models));

  await press(page, "Try again");
  await finished(page);
  assert.equal(await answers(page).count(), 1);
  await shows(last(page).locator(".answer"), /hello/i);
  const { thoughtSeconds } = (await stored(page)).turns[1]; // a fast engine's may last no time
  const title = thoughtSeconds >= 0.1 ? `Thought for ${thoughtSeconds.toFixed(1)} s` : "Thought";
  await last(page).locator("summary").waitFor();
  assert.equal(await last(page).locator("summary").innerText(), title);
  assert.equal(await last(page).locator("details").getAttribute("open"), null);
  await shows(last(page).locator(".facts"), /[\d.,]+ tokens\/s.*\d+ tokens.*0 of \d+ prompt tokens/);

  await page.fill("#message", "two");
  await page.press("#message", "Shift+Enter");
  await page.keyboard.type("lines");
  await page.press("#message", "Enter");
  await finished(page);
  assert.equal(await page.locator(".turn.user .text").last().innerText(), "two\nlines");
  const { messages, stream } = bodies(requests).at(-1);
  assert.deepEqual(messages.map(({ role }) => role), ["user", "assistant", "user"]);
  assert.equal(messages[1].content, (await stored(page)).turns[1].content);
  assert.equal(stream, true);

  await page.keyboard.press("Alt+r");
  await finished(page);
  assert.deepEqual(bodies(requests).at(-1).messages, messages);
  assert.equal(await answers(page).count(), 2);
  // The same prompt again: its whole pages are in the cache.
  await shows(last(page).locator(".facts"), /[1-9]\d* of \d+ prompt tokens cached/);

  await last(page).locator("summary").click();
  await page.fill("#message", "not sent yet");
  await page.reload();
  await keyedAfterReload(page);
  assert.equal(await answers(page).count(), 2);
  assert.equal(await last(page).locator("details").getAttribute("open"), "");
  assert.equal(await page.inputValue("#message"), "not sent yet");

  await page.keyboard.press("Alt+n");
  assert.equal(await answers(page).count(), 0);
  await say(page, "你好");
  await finished(page);
  assert.equal(bodies(requests).at(-1).messages.length, 1);
  assert.equal(await page.locator("#conversations li").count(), 2);
  await page.keyboard.press("Alt+ArrowDown");
  assert.equal(await answers(page).count(), 2);
  assert.equal(await page.inputValue("#message"), "not sent yet");
  await page.keyboard.press("Alt+e");
  await shows(page.locator(".tiles"), /[1-9]\d* of \d+ tokens/);
  await shows(page.locator(".legend"), /^0 in use/);
  await shows(page.locator(".requests"), "None is running.");
  await page.keyboard.press("Alt+e");
  page.once("dialog", (dialog) => dialog.accept());
  await page.locator("#conversations li").last().hover();
  await page.locator("#conversations li").last().locator(".delete").click();
  assert.equal(await page.locator("#conversations li").count(), 1);
  await shows(page.locator(".turn.user"), "你好");
}

async function keyedAfterReload(page) {
  await page.locator("#model option").first().waitFor({ state: "attached" });
}

/** Every setting reaches the server, and the server's own words come back. */
export async function settings({ page, requests, options }) {
  await keyed(page, options);
  await say(page, "hello");
  await finished(page);
  const plain = bodies(requests).at(-1);
  assert.deepEqual(Object.keys(plain).sort(), ["messages", "model", "stream", "stream_options"]);
  await page.selectOption("#model", { index: 1 });
  await page.keyboard.press("Alt+,");
  await page.fill("#system", "Be brief.");
  await page.fill("#temperature", "0");
  await page.fill("#top-p", "0.5");
  await page.fill("#max-tokens", "2");
  await page.selectOption("#thinking", "disabled");
  await page.keyboard.press("Escape");
  await page.reload();
  await keyedAfterReload(page);
  await page.keyboard.press("Alt+n");
  await say(page, "hello");
  await finished(page);
  const { messages, model, ...others } = bodies(requests).at(-1);
  assert.deepEqual(messages[0], { role: "system", content: "Be brief." });
  assert.notEqual(model, plain.model);
  assert.deepEqual(others, {
    stream: true,
    stream_options: { include_usage: true },
    temperature: 0,
    top_p: 0.5,
    max_tokens: 2,
    thinking: { type: "disabled" },
  });
  await shows(last(page).locator(".facts"), /Ended at the token limit.*2 tokens/);
  await page.keyboard.press("Alt+,");
  await page.fill("#temperature", "7"); // not a value: the last good one stays
  await page.fill("#max-tokens", "");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Alt+r");
  await finished(page);
  const again = bodies(requests).at(-1);
  assert.equal(again.temperature, 0);
  assert.equal("max_tokens" in again, false);
}

/** The server ends and starts again while the page stays open. */
export async function goneAndBack({ page, server, options }) {
  await keyed(page, options);
  await say(page, "hello");
  await finished(page);
  await server("stop");
  await say(page, "are you there?");
  await shows(last(page).locator(".error"), "cannot be reached");
  await shows(page.locator("#notice"), "does not answer");
  await shows(page.locator(".turn.user").last(), "are you there?");
  await page.fill("#message", "a draft");
  await page.click("#tab-engine");
  await shows(page.locator("#figures"), "does not answer");
  await page.click("#tab-chat");
  await server("start");
  await shows(page.locator("#notice"), "is back");
  assert.equal(await page.inputValue("#message"), "a draft");
  await press(page, "Try again");
  await finished(page);
  await last(page).locator(".answer > *").first().waitFor();
  assert.equal(await last(page).locator(".error").isVisible(), false);
  assert.equal(await answers(page).count(), 2);
  await page.locator("#notice").waitFor({ state: "hidden" });
}

/** A stream is seen growing, stopped by Esc and by the button, and the engine is free again. */
export async function stop({ page, server }) {
  await say(page, "count");
  await shows(last(page).locator("summary"), /Thinking… \d+ s/);
  await shows(last(page).locator(".answer"), "3");
  assert.equal(await last(page).getAttribute("aria-busy"), "true");
  assert.equal(await server("live"), 1);
  await page.keyboard.press("Escape");
  await shows(last(page).locator(".facts"), "Stopped");
  assert.equal(await last(page).getAttribute("aria-busy"), "false");
  assert.equal(await server("idle"), true);
  const kept = await last(page).locator(".answer").innerText();
  assert.match(kept, /^1 2 3/);
  assert.doesNotMatch(kept, /199/);
  await press(page, "Answer again");
  await shows(last(page).locator(".answer"), "2");
  await page.click("#stop");
  await shows(last(page).locator(".facts"), "Stopped");
  assert.equal(await server("idle"), true);

  // A stream goes on while another conversation is read.
  await press(page, "Answer again");
  await page.click("#new");
  assert.equal(await page.locator("#send").isVisible(), true);
  await page.locator("#conversations .open").first().click();
  await shows(last(page).locator(".answer"), "2");
  page.once("dialog", (dialog) => dialog.accept());
  await page.locator("#conversations li").first().hover();
  await page.locator(".delete").first().click();
  assert.equal(await server("idle"), true);
}

/** What a model or a reader writes never becomes markup, whatever it is. */
export async function markup({ page }) {
  const attack = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>';
  await say(page, attack);
  await finished(page);
  await last(page).locator("summary").click();
  await shows(last(page).locator(".answer"), attack);
  await shows(last(page).locator(".thought .text"), attack);
  await shows(page.locator(".turn.user"), attack);
  const found = await page.evaluate(() => ({
    hit: window.hit ?? 0,
    elements: document.querySelectorAll("main :is(img, script, iframe, a, style, object)").length,
    code: document.querySelector(".answer pre code").textContent,
    bold: document.querySelector(".answer strong").textContent,
  }));
  assert.deepEqual(found, { hit: 0, elements: 0, code: attack, bold: "<b>bold</b>" });
  await shows(last(page).locator(".answer"), "[link](javascript:window.hit=1)");
  await page.click("#tab-engine");
  await page.evaluate((text) => localStorage.setItem("fathom.theme", text), attack);
  await page.reload();
  await shows(page.locator(".turn.user"), attack);
  assert.equal(await page.evaluate(() => window.hit), undefined);
}

/** An error inside a stream is shown, and what came before it stays. */
export async function brokenStream({ page }) {
  await say(page, "hello");
  await shows(last(page).locator(".error"), "The server says:");
  await shows(last(page).locator(".answer"), "as far as this");
  await page.getByRole("button", { name: "Try again" }).waitFor();
  await page.route("**/v1/chat/completions", (route) => route.fulfill({
    contentType: "text/event-stream",
    body: ': comment\r\n\r\ndata: {"choices":[{"delta":{"content":"half"}}]}\r\n\r\n',
  }));
  await press(page, "Try again");
  await shows(last(page).locator(".error"), "connection broke");
  await shows(last(page).locator(".answer"), "half");
}

/** The parts that need no server: events split anywhere, and the forms of text. */
export async function parts({ page }) {
  const found = await page.evaluate(async () => {
    const { EventParser } = await import("/page/api.js");
    const { Rendering } = await import("/page/markdown.js");
    const { shares } = await import("/page/figures.js");
    const encoder = new TextEncoder();
    const stream = ': x\n\ndata: {"a":\r\ndata: "你好🙂"}\r\n\r\nevent: m\rdata:one\rdata: two\r\rdata\n\nid: 4\n\n';
    const bytes = encoder.encode(stream);
    const whole = new EventParser().feed(bytes);
    const differing = [];
    for (let first = 0; first <= bytes.length; first += 1) {
      for (const second of [first, first + 1, bytes.length]) {
        const parser = new EventParser();
        const cuts = [bytes.slice(0, first), bytes.slice(first, second), bytes.slice(second)];
        const events = cuts.flatMap((cut) => parser.feed(cut));
        if (JSON.stringify(events) !== JSON.stringify(whole)) differing.push([first, second]);
      }
    }
    const html = (text) => {
      const element = document.createElement("div");
      new Rendering(element).update(text);
      return element.innerHTML;
    };
    const text = "# A *b*\n\npara `x<y` **bold**\nnext ** loose `\n- one\n  - two\n- three\n\n> said\n\n"
      + "```py\na = `1`\n\nb\n```\n3. c\n\n|a|b|\n|-|-|\n|1|2|\n\n---\n~~~\nopen\n- no list";
    const grown = document.createElement("div");
    const rendering = new Rendering(grown);
    for (let end = 0; end <= text.length; end += 1) rendering.update(text.slice(0, end));
    const first = grown.firstChild;
    rendering.update(`${text}\nmore`);
    const started = performance.now();
    for (const part of ["`", "**", "* ", "> ", "|", "``` ", "# ", "1. ", "` `` ", "**a"]) {
      html(part.repeat(40_000));
      html(`${part}\n`.repeat(4_000));
    }
    return {
      whole, differing, html: html(text), grown: grown.innerHTML === html(`${text}\nmore`),
      kept: grown.firstChild === first, slow: performance.now() - started > 20_000,
      shares: shares({ num_pages: 10, num_free_pages: 6, num_cached_pages: 7 }),
      empty: shares({ num_pages: 10, num_free_pages: 10, num_cached_pages: 0 }),
    };
  });
  assert.deepEqual(found.whole, ['{"a":\n"你好🙂"}', "one\ntwo", ""]);
  assert.deepEqual(found.differing, []);
  assert.equal(found.html, [
    "<h3>A *b*</h3>",
    "<p>para <code>x&lt;y</code> <strong>bold</strong>\nnext ** loose `</p>",
    "<div><ul><li>one<ul><li>two</li></ul></li><li>three</li></ul></div>",
    "<blockquote>said</blockquote>",
    '<pre tabindex="0" data-language="py"><code>a = `1`\n\nb</code></pre>',
    '<div><ol start="3"><li>c</li></ol></div>',
    '<div class="table" tabindex="0"><table><tbody><tr><th>a</th><th>b</th></tr>'
      + "<tr><td>1</td><td>2</td></tr></tbody></table></div>",
    "<hr>",
    '<pre tabindex="0"><code>open\n- no list</code></pre>',
  ].join(""));
  assert.equal(found.grown, true);
  assert.equal(found.kept, true);
  assert.equal(found.slow, false);
  assert.deepEqual(found.shares, { used: 4, cached: 3, free: 3 });
  assert.deepEqual(found.empty, { used: 0, cached: 0, free: 10 });
}

const backdrop = (page) => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
const isDark = async (page) => Number((await backdrop(page)).match(/\d+/)[0]) < 128;

/** Both languages and both themes, as the system has them and as they are chosen. */
export async function looks({ page }) {
  assert.equal(await page.getAttribute("html", "lang"), "zh-CN");
  await shows(page.locator("#tab-engine"), "引擎");
  assert.equal(await page.getAttribute("#message", "placeholder"), "写一条消息");
  assert.equal(await isDark(page), true);
  await say(page, "你好");
  await finished(page);
  await shows(last(page).locator(".facts"), "个词元");
  await shows(last(page).locator("summary"), /思考了 [\d.]+ 秒/);
  await page.click("#open-settings");
  await page.selectOption("#language", "en");
  await page.selectOption("#theme", "light");
  await page.keyboard.press("Escape");
  assert.equal(await page.getAttribute("html", "lang"), "en");
  await shows(page.locator("#tab-engine"), "Engine");
  await shows(last(page).locator("summary"), /Thought for [\d.]+ s/);
  assert.equal(await isDark(page), false);
  await page.reload();
  assert.equal(await isDark(page), false);
  await shows(page.locator("#tab-engine"), "Engine");
  await page.emulateMedia({ colorScheme: "light" });
  await page.click("#open-settings");
  await page.selectOption("#theme", "dark");
  assert.equal(await isDark(page), true);
  await page.selectOption("#theme", "");
  assert.equal(await isDark(page), false);
  const said = await page.evaluate(async () => Object.values((await import("/page/words.js")).LANGUAGES)
    .map((words) => Object.keys(words).length));
  assert.equal(said[0], said[1]);
}

/** The one conversation that the browser keeps. */
async function stored(page) {
  return JSON.parse(await page.evaluate(() => {
    const name = Object.keys(localStorage).find((key) => key.includes("conversation."));
    return localStorage.getItem(name);
  }));
}
