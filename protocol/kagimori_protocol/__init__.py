"""What crosses the wire between a confidential VM and its owner's verifier, and nothing else.

Pure: no I/O, no clock, and no randomness of its own but that of sealing. Both ends import it; it imports
neither.
"""
