//! `ferry`: every role of FerryMQ, and the tool to run them. Exit code 0 done, 1 failed, 2 usage, 3 unreachable.

mod cli;
mod dev;
mod roles;

use std::process::ExitCode;

use clap::Parser;

/// Connections and files count as one: as many as the system lets this process have.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // If it may not, it goes on with what it has.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    allow_many_files();
    if !cli.command.is_server() {
        // `ferry … | head` ends quietly.
        sigpipe::reset();
    }
    let runtime = match cli.command.is_server() {
        true => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
        // A command is one connection and one answer.
        false => tokio::runtime::Builder::new_current_thread().enable_all().build(),
    };
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(cli::run(cli));
            runtime.shutdown_background();
            result
        }
        Err(e) => Err(e.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
