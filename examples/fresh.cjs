// Random numbers for Node that no two copies of a snapshot have in common:
//
//     torpor guest node --require ./fresh.cjs --import ./guest.mjs SERVER
//
// Node keeps the state of its OpenSSL, of Math.random() and some UUIDs drawn in advance, and has no way to renew
// them. So crypto.random*(), getRandomValues() and randomUUID() ask the kernel every time, and Math.random() has a pool
// that renew() empties, in every thread that is started with this. What Node makes by itself still comes from its
// OpenSSL: keys of generateKeyPair(), handshakes of TLS.
'use strict';
const crypto = require('node:crypto'), fs = require('node:fs');
const { syncBuiltinESMExports } = require('node:module');
const { getEnvironmentData, isMainThread, setEnvironmentData } = require('node:worker_threads');

const urandom = fs.openSync('/dev/urandom', 'r');
const NAME = 'torpor: how often random numbers were renewed';
if (isMainThread) setEnvironmentData(NAME, new Int32Array(new SharedArrayBuffer(4)));
const renewals = getEnvironmentData(NAME); // one counter, which all threads see

// Makes every thread forget the numbers that it has in stock for Math.random(). Call it at the start, too: while nobody
// has, as in the children of cluster, no numbers are kept in stock.
function renew() {
  Atomics.add(renewals, 0, 1);
}

function fill(view) {
  const all = ArrayBuffer.isView(view) ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array(view);
  for (let at = 0; at < all.length;) at += fs.readSync(urandom, all, at, all.length - at, null);
  return view;
}

function later(callback, make) {
  if (callback === undefined) return make();
  setImmediate(() => {
    let found;
    try { found = make(); } catch (error) { return callback(error); }
    callback(null, found);
  });
}

function randomFillSync(view, offset = 0, size = undefined) {
  const unit = view.BYTES_PER_ELEMENT ?? 1; // as Node has it: in elements of the array
  const end = size === undefined ? view.byteLength : (offset + size) * unit;
  if (!(offset >= 0 && offset * unit <= end && end <= view.byteLength)) throw new RangeError('out of the buffer');
  fill(new Uint8Array(view.buffer ?? view, (view.byteOffset ?? 0) + offset * unit, end - offset * unit));
  return view;
}

function randomFill(view, ...rest) {
  const callback = rest.pop();
  later(callback, () => randomFillSync(view, ...rest));
}

function randomBytes(size, callback) {
  const found = Buffer.alloc(size);
  return later(callback, () => fill(found));
}

// Without a remainder that would make some numbers likelier than others.
function randomInt(low, high, callback) {
  if (high === undefined || typeof high === 'function') [low, high, callback] = [0, low, high];
  const range = high - low;
  if (!(Number.isSafeInteger(low) && Number.isSafeInteger(high) && range > 0 && range < 2 ** 48))
    throw new RangeError(`no range: from ${low} to ${high}`);
  return later(callback, () => {
    for (;;) {
      const drawn = randomBytes(6).readUIntBE(0, 6);
      if (drawn < 2 ** 48 - (2 ** 48 % range)) return low + (drawn % range);
    }
  });
}

function randomUUID() {
  const found = randomBytes(16);
  found[6] = (found[6] & 0x0f) | 0x40;
  found[8] = (found[8] & 0x3f) | 0x80;
  return found.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
}

const stock = new BigUint64Array(128);
let left = 0, renewed = 0;
Math.random = function random() {
  if (left === 0 || Atomics.load(renewals, 0) !== renewed) {
    renewed = Atomics.load(renewals, 0);
    left = renewed ? stock.length : 1;
    fill(stock.subarray(0, left));
  }
  return Number(stock[--left] >> 11n) / 2 ** 53;
};

const made = { randomBytes, randomFill, randomFillSync, randomInt, randomUUID };
for (const name of ['pseudoRandomBytes', 'prng', 'rng']) if (name in crypto) made[name] = randomBytes;
for (const [name, value] of Object.entries(made)) {
  Object.defineProperty(crypto, name, { value, writable: true, configurable: true, enumerable: true });
}
const web = Object.getPrototypeOf(crypto.webcrypto);
Object.assign(web, { getRandomValues: fill, randomUUID });
syncBuiltinESMExports(); // for those who import { randomBytes } from 'node:crypto'
module.exports = { renew };
