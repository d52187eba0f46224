"""What a job is and how it is run: begin, call, settle. Knows no terminal."""
