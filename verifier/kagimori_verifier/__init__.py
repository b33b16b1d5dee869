"""The verifier that a VM's owner runs: it judges evidence and releases keys under the owner's policy."""
