"""Speed of a pass: what to expect (``plan``), what is done (``progress``) and what limits it (``limits``)."""
