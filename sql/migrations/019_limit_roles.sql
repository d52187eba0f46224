-- What a role that does not own the tables may do with credits. sql/roles.sql grants it the rest.

-- The balances move by what was entered into the ledger: who may enter it need not be able to change them.
ALTER FUNCTION move_balances() SECURITY DEFINER;
ALTER FUNCTION guard_balance() SECURITY DEFINER;

-- Who may run jobs enters what they cost, and nothing else: what teams are given is for those who may change it. The
-- owner of the tables is exempt from all of this.
ALTER TABLE credit_transactions ENABLE ROW LEVEL SECURITY;

CREATE POLICY credit_transactions_read ON credit_transactions FOR SELECT USING (true);
CREATE POLICY credit_transactions_purge ON credit_transactions FOR DELETE USING (true);
CREATE POLICY credit_transactions_enter ON credit_transactions FOR INSERT WITH CHECK (
    transaction_type = 'deduction'
    OR has_column_privilege('public.team_credits', 'credits_allocated', 'UPDATE')
);
