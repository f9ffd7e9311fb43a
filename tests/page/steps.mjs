// What the scenarios do and wait for again and again.

export const answers = (page) => page.locator(".turn.assistant");
export const last = (page) => answers(page).last();

/** Wait until the text of `locator` matches. */
export async function shows(locator, wanted) {
  await locator.filter({ hasText: wanted }).first().waitFor();
}

export async function say(page, text) {
  await page.fill("#message", text);
  await page.press("#message", "Enter");
}

export const press = (page, name) => page.getByRole("button", { name, exact: true }).click();

export async function finished(page) {
  await page.locator("#send").waitFor();
  await last(page).locator(".facts").waitFor();
}

export function bodies(requests) {
  return requests
    .filter((request) => request.url().endsWith("/chat/completions"))
    .map((request) => request.postDataJSON());
}

export async function enterKey(page, key) {
  await page.click("#open-settings");
  await page.fill("#key", key);
  await page.keyboard.press("Escape");
  await page.locator("#settings").waitFor({ state: "hidden" });
}

export async function keyed(page, options) {
  await enterKey(page, options.key);
  await page.locator("#model option").first().waitFor({ state: "attached" });
}
