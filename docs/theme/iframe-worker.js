// Browsers start no worker from disk: there the script of the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      window.addEventListener("message", ({ source, data }) => {
        if (source === this.inside) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      const answer = "<script>postMessage = data => parent.postMessage(data, '*')</script>";
      this.inside.document.write(`<body>${answer}<script src="${url}"></script>`);
      this.inside.document.close();
      this.ready = new Promise((resolve) => frame.addEventListener("load", resolve));
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
