// InferenceService: between the wire and the engine.

import { createRequire } from "node:module";

import { invalid, precondition } from "./errors.js";
import { SIGNATURE } from "./law.js";
import { Sequence } from "./sequence.js";
import { readTokenIds } from "./tensors.js";
import { Staging } from "./updates.js";

const MAX_TOPK = 20;
const { version: VERSION } = createRequire(import.meta.url)("../package.json");

/** Prompt and sampling parameters, checked. */
function checkedRequest({ prompt_token_ids: tensor, sampling }) {
  const prompt = readTokenIds(tensor);
  const { vocab_size: vocabSize, context_length: contextLength } = SIGNATURE;
  if (!sampling) throw invalid("the request has no sampling parameters");
  const { temperature, max_tokens: maxTokens, stop_token_ids: stops, topk } = sampling;
  if (!(Number.isFinite(temperature) && temperature > 0)) {
    throw invalid(`temperature must be a finite number above 0, but is ${temperature}`);
  }
  if (maxTokens < 1) throw invalid("max_tokens must be at least 1");
  if (!prompt.length) throw invalid("the prompt is empty; give at least one token");
  if (prompt.length + 1 > contextLength) {
    throw invalid(`a prompt of ${prompt.length} tokens leaves no room to sample in a context of ${contextLength}`);
  }
  const outside = (tokenId) => tokenId < 0 || tokenId >= vocabSize;
  if (prompt.some(outside)) throw invalid(`a prompt token id is outside the vocabulary of ${vocabSize}`);
  if (stops.some(outside)) throw invalid(`a stop token id is outside the vocabulary of ${vocabSize}`);
  if (topk > MAX_TOPK) throw invalid(`top-${topk} was asked for; at most top-${MAX_TOPK} is recorded`);
  // uint64 travels as a string: a double holds 53 bits only.
  return { prompt, sampling: { ...sampling, seed: BigInt(sampling.seed) } };
}

export function service(engine) {
  // Epochs count the learners of one run; this server may outlive a run.
  const highestEpochs = new Map();

  /** Puts a whole update in force; returns the version that is served then. */
  function inForce(staging) {
    const { version, key } = staging.verified();
    const epoch = BigInt(staging.header.publisher_epoch);
    const highest = highestEpochs.get(version.run) ?? 0n;
    if (epoch < highest) {
      throw precondition(`weights of learner epoch ${epoch} are refused: epoch ${highest} has taken over`);
    }
    highestEpochs.set(version.run, epoch);
    engine.swap(version, key);
    return version;
  }

  return {
    Generate(call) {
      try {
        const { prompt, sampling } = checkedRequest(call.request);
        const sequence = new Sequence(prompt, sampling, (response) => {
          call.write(response);
          if (response.finished) call.end();
        });
        call.on("cancelled", engine.submit(sequence, (error) => call.emit("error", error)));
      } catch (error) {
        call.emit("error", error);
      }
    },

    UpdateWeights(call, callback) {
      const staging = new Staging();
      let answered = false;
      const answer = (error, response) => {
        if (!answered) callback(error, response);
        answered = true;
      };
      const attempt = (action) => {
        try {
          if (!answered) action();
        } catch (error) {
          answer(error);
        }
      };
      call.on("data", (message) => attempt(() => staging.add(message)));
      call.on("cancelled", () => (answered = true));
      call.on("error", () => (answered = true));
      call.on("end", () => {
        attempt(() => answer(null, { version: inForce(staging), paused: { seconds: 0, nanos: 0 } }));
      });
    },

    PauseGeneration(call, callback) {
      engine.pause();
      callback(null, {});
    },

    ResumeGeneration(call, callback) {
      engine.resume();
      callback(null, {});
    },

    GetServerInfo(call, callback) {
      callback(null, {
        signature: SIGNATURE,
        engine: `node-arithmetic/${VERSION}`,
        logprob_mode: "LOGPROB_MODE_SAMPLED",
        version: engine.version,
        max_topk: MAX_TOPK,
        routing: true,
        max_concurrency: engine.options.maxConcurrency,
      });
    },
  };
}
