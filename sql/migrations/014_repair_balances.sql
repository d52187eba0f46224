-- A balance can be wrong only where somebody has changed it with the triggers off. Then it does not move any more, which
-- would carry the fault into the ledger, until it is repaired: the guard also lets a balance become what the whole
-- ledger of its team says. Nobody gains a credit by that which the ledger does not have.

CREATE OR REPLACE FUNCTION guard_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    was_right    boolean;
    is_explained boolean;
    is_restored  boolean;
BEGIN
    SELECT OLD.credits_remaining = coalesce(
               (
                   SELECT credits_after
                   FROM ONLY public.credit_transactions
                   WHERE team_id = OLD.team_id AND entry_no = OLD.last_entry_no
               ),
               0
           ),
           NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = OLD.last_entry_no + count(*)
           AND NEW.credits_allocated - OLD.credits_allocated
               = coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0)
           AND NEW.credits_used - OLD.credits_used
               = coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0)
    INTO was_right, is_explained
    FROM ONLY public.credit_transactions
    WHERE team_id = OLD.team_id AND entry_no > OLD.last_entry_no;

    IF was_right AND is_explained THEN
        RETURN NEW;
    END IF;

    SELECT NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = coalesce(max(entry_no), 0)
           AND NEW.credits_allocated
               = coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0)
           AND NEW.credits_used
               = coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0)
    INTO is_restored
    FROM ONLY public.credit_transactions
    WHERE team_id = OLD.team_id;

    IF is_restored THEN
        RETURN NEW;
    ELSIF is_explained THEN
        RAISE EXCEPTION 'the balance of team % is not what its ledger says', OLD.team_id
            USING ERRCODE = 'SL006', HINT = format('Run: saasllm credits verify %s --repair', OLD.team_id);
    END IF;
    RAISE EXCEPTION 'the credits of team % move only with their ledger rows', OLD.team_id
        USING ERRCODE = 'SL006', HINT = 'Insert into credit_transactions, as saasllm credits add does.';
END
$$;
