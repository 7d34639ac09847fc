// Makes a program for Node take part in snapshots. Node can neither make a memfd nor map one, so it is started by
// `torpor guest`, which leaves it the page and an eventfd as descriptors:
//
//     torpor guest node --require ./fresh.cjs --import ./guest.mjs SERVER     a server; nothing in it needs to know
//     torpor guest node guest.mjs LOG         alone: a line in LOG for everything that happens to it
//
// A program that wants to know listens to `process`: 'prepare' before a snapshot is taken, then one of 'resumed',
// 'abandoned' and 'restored' (generation, argument). Random numbers come from the kernel (fresh.cjs).
// docs/guest-protocol.md has the layout of the page.
import fs from 'node:fs';
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { isMainThread } from 'node:worker_threads';
import fresh from './fresh.cjs';

const [page] = (process.env.TORPOR_GUEST ?? '').split(',').map(Number);
const IDLE = 0, PREPARE = 1, READY = 2, RESUMED = 4, ABANDONED = 5, RESTORED = 6;
const GENERATION = 0, STATE = 40, SIGNAL = 44, TIMEOUT = 60, ARGUMENT_SIZE = 68, ARGUMENT = 1024;
const SIGUSR2 = 12; // SIGUSR1 is Node's own, for its debugger

function bytes(offset, size) {
  const found = Buffer.alloc(size);
  fs.readSync(page, found, 0, size, offset);
  return found;
}

function get(offset) {
  return bytes(offset, 4).readUInt32LE();
}

function put(offset, value) {
  const word = Buffer.alloc(4);
  word.writeUInt32LE(value);
  fs.writeSync(page, word, 0, 4, offset);
}

// Stands still without giving the event loop a turn: between READY and the wake-up nothing else is to run.
const never = new Int32Array(new SharedArrayBuffer(4));
function nap(milliseconds) {
  Atomics.wait(never, 0, 0, milliseconds);
}

function answer() {
  if (get(STATE) === PREPARE) {
    process.emit('prepare');
    put(STATE, READY);
    // Node cannot ask for the page's lock, so it waits no longer than the dump said that it would.
    const end = Date.now() + (get(TIMEOUT) || 10000) + 1000;
    while (get(STATE) === READY && Date.now() < end) nap(2);
    if (get(STATE) === READY) put(STATE, ABANDONED);
  }
  const state = get(STATE);
  if (![RESUMED, ABANDONED, RESTORED].includes(state)) return;
  put(STATE, IDLE);
  if (state === RESTORED) {
    fresh.renew();
    process.emit('restored', get(GENERATION), bytes(ARGUMENT, get(ARGUMENT_SIZE)));
  } else {
    process.emit(state === RESUMED ? 'resumed' : 'abandoned');
  }
}

// A child, of cluster for example, has the environment but not the page, and no thread but the first gets signals.
function takesPart() {
  try {
    return isMainThread && fs.readlinkSync(`/proc/self/fd/${page}`).startsWith('/memfd:torpor-guest');
  } catch {
    return false;
  }
}

if (takesPart()) {
  process.on('SIGUSR2', answer);
  put(SIGNAL, SIGUSR2); // now that there is a handler
  fresh.renew();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const log = fs.openSync(process.argv[2], 'a');
  for (const name of ['prepare', 'resumed', 'abandoned']) process.on(name, () => fs.writeSync(log, `${name}\n`));
  process.on('restored', (generation, argument) => {
    fs.writeSync(log, `restored ${generation} ${argument} ${randomBytes(8).toString('hex')}\n`);
  });
  fs.writeSync(log, 'start\n');
  setInterval(() => {}, 1000);
}
