// A node.js program with an HTTP server: `node http_server.js ADDRESS PORT`; it answers as http_threads.py does.
// Meanwhile timers fire, objects come and go, and the thread pool computes digests: GET /health says "ok" while all do.
'use strict';
const crypto = require('crypto');
const http = require('http');

let served = 0;
const alarms = [];
const seen = { interval: Date.now(), pool: Date.now() };
const kept = new Map();

const digestOf = (text) => crypto.createHash('sha256').update(text).digest('hex');

function health() {
  const late = Object.keys(seen).filter((name) => Date.now() - seen[name] > 10000);
  return late.length || alarms.length ? `${late} ${alarms}` : 'ok';
}

// Buffers outside the garbage-collected heap and strings inside it, each with its digest.
let turn = 0;
setInterval(() => {
  const key = (turn * 7919) % 200;
  const old = kept.get(key);
  if (old && digestOf(old.content) !== old.digest) alarms.push('bytes');
  const content = turn % 2 ? crypto.randomBytes(1 + ((turn * 31) % 50000)) : String(turn).repeat(1000);
  kept.set(key, { content, digest: digestOf(content) });
  turn += 1;
  seen.interval = Date.now();
}, 5);

const wanted = crypto.pbkdf2Sync('word', 'salt', 5000, 32, 'sha256').toString('hex');
(function compute() {
  crypto.pbkdf2('word', 'salt', 5000, 32, 'sha256', (error, key) => {
    if (error || key.toString('hex') !== wanted) alarms.push('pool');
    seen.pool = Date.now();
    setTimeout(compute, 50);
  });
})();

const server = http.createServer((request, response) => {
  const number = request.url.replace(/\//g, '');
  if (number === 'health') return response.end(health());
  served += 1;
  const digest = digestOf(number);
  const content = `${number} ${served} ${digest}\n${digest.repeat(160)}`;
  response.setHeader('Content-Length', Buffer.byteLength(content));
  return response.end(content);
});
server.keepAliveTimeout = 0;
server.requestTimeout = 0;
server.listen(Number(process.argv[3]), process.argv[2]);
