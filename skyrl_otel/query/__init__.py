"""Reading runs: where they are (`sources`), what is asked for (`filters`), in which order (`merge`), how it looks
(`render`), and what it comes to (`summary`)."""
