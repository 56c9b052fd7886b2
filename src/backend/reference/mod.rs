//! backend/reference
