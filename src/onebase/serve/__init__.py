"""Serving: one base answers for every adapter of its stores, over HTTP or in this process.

scheduler, turns, settings    plain Python: queues, fairness, bounds, whose turn it is
catalog, tiers                which adapter a name means, and where its tensors are
engine, writing               rows and prompts of any adapters in shared forwards
keys, metrics, failures       who may ask, what happened, what went wrong
http, routes/                 FastAPI; nothing else here knows HTTP
"""
