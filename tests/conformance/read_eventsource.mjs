// Reads a stream with the npm package `eventsource` until the server ends it for good, and prints what it got.
import { EventSource } from "eventsource";

const got = [];
let opened = 0;
const source = new EventSource(process.argv[2]);
source.onopen = () => { opened += 1; };
source.onmessage = (event) => got.push([event.lastEventId, event.data]);
source.onerror = (error) => {
  if (source.readyState === EventSource.CLOSED) {
    process.stdout.write(JSON.stringify({ got, opened, code: error.code }));
  }
};
