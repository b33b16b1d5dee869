"""Keys at rest: the key-encryption key and what it wraps. Only release, identity and enrolment come in here."""
