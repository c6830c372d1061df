//! End-to-end tests are in `tests/`; there is no code here.
