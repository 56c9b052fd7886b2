//! What of this room only the room itself can see; files as a user meets them are tested under `tests`.
