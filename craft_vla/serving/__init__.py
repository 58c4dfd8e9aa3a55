"""A policy as a server that robots ask: openpi's websocket protocol and OpenVLA-OFT's HTTP (docs/serving.md)."""
