"""The three contracts, routes, plans, taps and anchors: everything that knows rows and nothing about methods."""
