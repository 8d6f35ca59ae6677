"""The devices that a worker computes on, behind one interface: `interface.py` says what a new one has to provide."""
