"""A world in a box: machine, SVSM, vTPM and kernel door, for tests, for CI and for a laptop without the hardware.

It really signs, really measures and really serves files; it differs from hardware only in whose root signed. Nothing
outside this room knows that it exists: a verifier meets it because its operator added the simulator's root.
"""
