// Browsers start no workers on pages that are opened from a folder. The search then runs in a hidden frame, which speaks
// as a worker does. Material's search asks for the name IFrameWorker where it loads further scripts.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.documentElement.append(this.frame)
      const inner = this.frame.contentWindow
      inner.postMessage = (data) => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      inner.importScripts = (...urls) => urls.reduce((before, each) => before.then(() => this.load(each)), Promise.resolve())
      this.ready = this.load(new URL(url, document.baseURI).href)
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement("script")
        Object.assign(script, { src: url, onload: resolve, onerror: reject })
        this.frame.contentDocument.head.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => {
        const inner = this.frame.contentWindow
        const event = new inner.MessageEvent("message", { data })
        inner.dispatchEvent(event)
        if (inner.onmessage) inner.onmessage(event)
      })
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.IFrameWorker = window.Worker = IFrameWorker
}
