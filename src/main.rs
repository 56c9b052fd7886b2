//! The `lonas` program: everything is in [`lonas::cli`].

fn main() -> std::process::ExitCode {
    lonas::cli::main()
}
