"""Built-in tasks: data that is made, not downloaded, with one rule to read an answer."""
