// Answers from the cache where the network does not. page.js fills the cache: it knows which files are of one version.

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

async function answer(request) {
  try {
    return await fetch(request);
  } catch (error) {
    const page = new URL(self.registration.scope).pathname === new URL(request.url).pathname;
    const stored = await caches.match(page ? "index.html" : request, { ignoreSearch: true });
    if (stored) return stored;
    throw error;
  }
}
