//! backend/cpu
