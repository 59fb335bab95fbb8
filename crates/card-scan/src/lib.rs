//! Looks for card numbers and security codes where none may be.
