//! What has to be installed.
