-- Databases as a whole.

-- name: drop_demo() :none
DROP DATABASE IF EXISTS saasllm_demo WITH (FORCE);

-- name: create_demo() :none
CREATE DATABASE saasllm_demo;
