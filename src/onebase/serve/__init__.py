"""Serving: one base answers for every adapter of its stores, over HTTP or in this process.

scheduler, turns, settings    plain Python: queues, fairness, bounds, whose turn it is
catalog, tiers                which adapter a name means, and where its tensors are
asked, engine                 rows and prompts of any adapters in shared forwards
text, writing                 texts while they are written, and the threads that write them
keys, metrics                 who may ask, what happened
http, routes/, bodies,        FastAPI: the application, its routes and their bodies, limits around them, errors;
outside, failures, server     nothing else here knows HTTP
training, training_process    training beside the server
"""
