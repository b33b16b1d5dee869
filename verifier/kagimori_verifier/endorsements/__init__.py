"""Where AMD's certificates and revocation lists come from: carried by evidence, or kept in a directory.

Nothing found here is trusted for having been found: ``verify`` chains it to a pinned root. AMD's key
distribution service comes behind the same interface later.
"""
