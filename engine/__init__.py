"""Running safely, in one process or many: text, plan, state, watching."""
