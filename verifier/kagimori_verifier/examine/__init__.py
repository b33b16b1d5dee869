"""Is one artefact authentic, whoever's it is? For commands that check a report, a log or a quote by itself.

The checks are those of ``verify``. What is here accepts more than a boot of ours may show: other banks, hashes,
key sizes and containers. So only the command line may import it (import-linter holds that), and what it accepts
beyond the protocol it names. Pure: no I/O, no clock.
"""
