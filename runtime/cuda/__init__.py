"""The back end for devices whose work is queued: steps as tensors, paged attention by a library, captured graphs, copies.

How it works: `step` turns a planned batch into the tensors that kernels read, in one upload; `attention` attends over
pages with what this machine has, tried against plain torch before it is used; `spans` decides which graphs there should
be and `graphs` captures and replays them; `runner` runs a stage's layers, by graphs where it can; `copies` moves tensors
between the device and the host beside the steps; `memory` says how large the page pool may be, `virtual` is where it lies when its
size follows the weights; `guard` asks whether a layer can be captured.

All of it but the capture itself is plain torch on any device, and the tests run it on the CPU. The streams:

- the compute thread runs everything that reads or writes pages on one stream of high priority. So a page is never read
  before its writes are done and never reused before its reads are, without a single event;
- copies between host and device have a stream of low priority, joined to the first by events at both ends;
- the shadow's loader has two more, one to load and warm up on and one to capture on.

A stage waits for the device once a step, at its end: what leaves it is then true, and so are the times it reports.

What is never true: a tensor of the host is read or written inside a capture; a graph holds the address of anything that
may move or be freed before it (the page pool does not move, static inputs live as long as their graphs).
"""
