/**
 * Keeps the page, the captioner and onnxruntime-web for offline use.
 *
 * What is kept once isn't fetched again. A page that is made anew has another version: that one is
 * fetched beside the old one, and takes its place when no tab shows the old one any more.
 */

const VERSION = "VERSION"; // filled in when the page is made
const LARGE = 1e6; // bytes
const HEADERS = {
  // With these two a page may compute in several threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

self.addEventListener("install", (event) => {
  event.waitUntil(keepFiles());
});

self.addEventListener("activate", (event) => {
  event.waitUntil(removeOthers().then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(self.registration.scope)) {
    event.respondWith(answer(request, event));
  }
});

/**
 * Fetch the page's files. At first the large ones are left to the page, which asks for them at this
 * moment and shows how far they are.
 */
async function keepFiles() {
  const response = await fetch("page.json", { cache: "no-cache" });
  const { files } = await response.clone().json();
  const cache = await caches.open(cacheName());
  await cache.put("page.json", response);
  const isNeeded = (name) => self.registration.active || files[name] < LARGE;
  const names = ["./", ...Object.keys(files).filter(isNeeded)];
  await cache.addAll(names.map((name) => new Request(name, { cache: "no-cache" })));
}

/** Remove what another version of this page has kept. */
async function removeOthers() {
  const ours = (name) => name.startsWith(`${self.registration.scope} `) && name !== cacheName();
  await Promise.all((await caches.keys()).filter(ours).map((name) => caches.delete(name)));
}

function cacheName() {
  return `${self.registration.scope} ${VERSION}`;
}

async function answer(request, event) {
  const cache = await caches.open(cacheName());
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept) return withHeaders(kept);
  const response = await fetch(request);
  if (response.status === 200) event.waitUntil(cache.put(request, response.clone()));
  return withHeaders(response);
}

function withHeaders(response) {
  if (response.type !== "basic" && response.type !== "default") return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}
