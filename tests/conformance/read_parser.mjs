// Reads a stream with the npm package `eventsource-parser`, in pieces that cut lines and characters anywhere.
import { createParser } from "eventsource-parser";

const PIECE_BYTES = 4099;
const got = [];
let id = "";
const parser = createParser({
  onEvent: (event) => {
    id = event.id ?? id;
    got.push([id, event.data]);
  },
  onError: (error) => { throw error; },
});
const decoder = new TextDecoder();
const response = await fetch(process.argv[2]);
for await (const chunk of response.body) {
  for (let start = 0; start < chunk.length; start += PIECE_BYTES) {
    parser.feed(decoder.decode(chunk.subarray(start, start + PIECE_BYTES), { stream: true }));
  }
}
process.stdout.write(JSON.stringify({ got }));
