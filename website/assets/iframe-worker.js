/* Search for pages that are opened as files: browsers start no worker from file://, so the search
   runs in a hidden frame that is spoken to as if it were one. Elsewhere this changes nothing. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.queue = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      const here = new URL(url, document.baseURI).href;
      frame.srcdoc = `<!doctype html><script>
        var importScripts = () => Promise.resolve();
        var postMessage = data => parent.dispatchEvent(
          new parent.MessageEvent("iframe-worker", { data: { data, from: window } }));
      <\/script><script src="${here}"><\/script>`;
      window.addEventListener("iframe-worker", event => {
        if (event.data.from !== frame.contentWindow) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data.data }));
      });
      frame.addEventListener("load", () => {
        this.loaded = true;
        this.queue.splice(0).forEach(data => this.deliver(data));
      });
      this.frame = frame;
      document.body.appendChild(frame);
    }
    deliver(data) {
      const inner = this.frame.contentWindow;
      inner.dispatchEvent(new inner.MessageEvent("message", { data }));
    }
    postMessage(data) {
      this.loaded ? this.deliver(data) : this.queue.push(data);
    }
    terminate() { this.frame.remove(); }
  };
  window.Worker = window.IFrameWorker;
}
