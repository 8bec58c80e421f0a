// Continuous batching over sequences; the event loop is the only one that steps, so weights change between two steps.

import { exhausted, precondition, unavailable } from "./errors.js";

export class Engine {
  /** @param options { maxConcurrency, maxQueued, chunkTokens, tokenMilliseconds } */
  constructor(options) {
    this.options = options;
    this.version = null;
    this.key = null;
    this.waiting = [];
    this.active = [];
    this.paused = false;
    this.closed = false;
    this.scheduled = false;
  }

  /** Queues a sequence; `fail` takes the error that ends it early. Returns a function that gives up the sequence. */
  submit(sequence, fail) {
    if (this.closed) throw unavailable("the server is stopping; send the request to another one");
    if (this.version === null) throw precondition("no weights are loaded yet; update the weights first");
    if (this.waiting.length >= this.options.maxQueued && this.active.length >= this.options.maxConcurrency) {
      throw exhausted(`${this.waiting.length} requests wait already; repeat later`);
    }
    const entry = { sequence, fail };
    this.waiting.push(entry);
    this.schedule();
    return () => {
      this.waiting = this.waiting.filter((other) => other !== entry);
      this.active = this.active.filter((other) => other !== entry);
    };
  }

  /** Puts verified weights in force: the next token of every sequence comes from them. */
  swap(version, key) {
    this.version = version;
    this.key = key;
  }

  pause() {
    this.paused = true;
  }

  resume() {
    this.paused = false;
    this.schedule();
  }

  /** Ends every sequence. */
  close() {
    this.closed = true;
    for (const { fail } of [...this.active, ...this.waiting]) fail(unavailable("the server is stopping"));
    this.active = [];
    this.waiting = [];
  }

  schedule() {
    if (this.scheduled || this.paused || !(this.active.length || this.waiting.length)) return;
    this.scheduled = true;
    const run = () => {
      this.scheduled = false;
      if (!this.paused) this.step();
      this.schedule();
    };
    // At least one turn of the event loop between two steps, in which requests, updates and pauses come in.
    if (this.options.tokenMilliseconds) setTimeout(run, this.options.tokenMilliseconds);
    else setImmediate(run);
  }

  /** One token for every active sequence, all from the same weights. */
  step() {
    const free = this.options.maxConcurrency - this.active.length;
    this.active.push(...this.waiting.splice(0, free));
    this.active = this.active.filter(({ sequence }) => {
      sequence.step(this.key, this.version);
      const reason = sequence.finishReason();
      if (reason !== null) sequence.finish(reason);
      else if (sequence.unsent >= this.options.chunkTokens) sequence.flush();
      return reason === null;
    });
  }
}
